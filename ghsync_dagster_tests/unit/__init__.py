"""What a unit does, without servers; property-based where a law exists."""

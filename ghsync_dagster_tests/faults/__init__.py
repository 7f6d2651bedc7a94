"""What holds through kills, outages, poison and races; the short campaign, or the long one of ``make faults``."""

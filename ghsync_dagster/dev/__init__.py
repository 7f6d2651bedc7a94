"""For whoever tries ghsync: samples, real hours of GH Archive, a workload, and the rehearsal of the change path."""

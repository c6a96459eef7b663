"""What a run will need, before it starts: measured on this machine, estimated for another."""

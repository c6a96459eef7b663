"""What a recipe needs before it is run: measured on this machine, estimated for another."""

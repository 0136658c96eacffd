"""Every check and figure that needs a CUDA card, in one call of under ten minutes: `make gpu`."""

"""The methods of the control plane: decode, call, encode."""

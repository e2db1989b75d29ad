"""What is done to hidden states and gradients that leave the data owner, and how they are encoded and counted."""

"""The treatment of hidden states and gradients that leave the data owner: noise, encodings, and their accounting."""

"""PEFT adapters of a whole model on its components."""

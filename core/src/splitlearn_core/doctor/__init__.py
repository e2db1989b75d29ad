"""Why is a plugin not seen, why does a model not load: checks, whose findings say how to fix them."""

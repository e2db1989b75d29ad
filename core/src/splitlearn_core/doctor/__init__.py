"""Why is my plugin not seen, why does my model not load: checks, each with what would mend what it finds."""

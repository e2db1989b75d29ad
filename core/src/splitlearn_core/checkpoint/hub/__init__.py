"""Downloads from the Hub: whole files, or only the byte ranges that are needed."""

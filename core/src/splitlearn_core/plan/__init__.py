"""From names and numbers to a plan. No torch, no transformers, no file is opened here."""

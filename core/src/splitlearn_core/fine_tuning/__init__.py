"""Fine-tuning the bundled model split and unsplit, on a text that it has not seen."""

"""Getting the needed bytes of a repository on the Hub onto this machine."""

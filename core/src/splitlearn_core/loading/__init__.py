"""From a name to components: opening, planning, options, load."""

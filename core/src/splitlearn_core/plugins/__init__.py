"""Discovery, isolation and look-up of plugins. Nothing here imports a plugin that was not requested."""

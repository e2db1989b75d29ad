"""The former module of the functions that read configuration files; see :mod:`splitlearn_core.manager.config`."""

from splitlearn_core.manager.config import ConfigFile, load_configs, read_config_file

__all__ = ["ConfigFile", "load_configs", "read_config_file"]

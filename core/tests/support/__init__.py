"""What the tests of this repository share, and no wheel holds: a Hub on loopback, loaders that wait, a clean process.

``pythonpath`` in the configuration of pytest finds it. The tests of a plugin do not use it: they come without it in the
plugin's source archive.
"""

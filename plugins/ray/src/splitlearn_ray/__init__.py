"""The host ``ray``: trunks on the machines of a Ray cluster, ``ModelConfig(host="ray", host_options={...})``.

Ray places an actor for each trunk, watches it, and frees its resources. The actor runs the same sessions as any other
host, and says where it listens: hidden states go straight there, and no tensor goes through Ray.
"""

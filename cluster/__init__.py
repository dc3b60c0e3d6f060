"""Ray clusters outside Kubernetes: several nodes on one machine, `ray up` files, DeepSpeed profiles, and a local S3 server.

Everything here stands around the library: `plora_ray` never imports it.
"""

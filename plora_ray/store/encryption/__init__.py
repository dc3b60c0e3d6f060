"""Encryption of what the store holds of users: every user's record under a data key of the user's own.

Three layers, each of which wraps the next: the operator's root key (a file, the environment, AWS KMS), a ring of wrapping keys in
keys/ring.json, and the users' data keys in keys/{xx}.safetensors. Changing the root key rewrites one small object; destroying a data
key makes all that was ever sealed for its user unreadable. Knows bytes and user keys; knows nothing of segments or generations.
"""

"""ringspan: prefill million-token documents once, keep the KV, ask any number of questions.

The code lives in the repository's root folders (`attention/`, `cluster/`, `deploy/`, `kernels/`,
`kvstore/`), each linked in here, so that it is imported as `ringspan.attention.ring`.
"""

__version__ = "0.1.0"

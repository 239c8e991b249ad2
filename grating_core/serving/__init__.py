"""The HTTP server: one handler, in the dialects that clients of rerankers speak.

A body of any dialect becomes requests, which wait in the engine's own queue and share its passes. The results
become an answer of the same dialect. This room needs the extra ``serve``.
"""

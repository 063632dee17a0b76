"""Decoding: an engine on ids, and `generate` on chats."""

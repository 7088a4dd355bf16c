"""Drafts on the trained phantom: ids, passes and time beside plain decoding, and (`laws`) by a simulated clock."""

"""Responses, rewards, groups."""

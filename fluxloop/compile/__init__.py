"""A step as one graph: traced with stand-ins, compiled, called with what it rests on compared, or refused in words."""

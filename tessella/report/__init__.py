"""Pages for people: what a run did, saw and learned."""

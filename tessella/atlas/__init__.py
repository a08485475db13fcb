"""Explore images by what a backbone sees in them: clusters, copies, odd ones; name clusters, get labels."""

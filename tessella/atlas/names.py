"""Names of clusters and labels of images: the log of what a person has decided, and what follows from it.

The page writes `names.json`; `tessella label` and all that follows read it. An event is one action:

    {"action": "name", "clusters": ["2.1", "3"], "name": "beach", "time": "2026-01-31T09:30:00Z"}
    {"action": "split", "cluster": "2.1.3", "images": ["81925", ...]}
    {"action": "label", "images": ["81925", ...], "name": "beach"}
    {"action": "drop", "images": ["81925", ...]}
    {"action": "keep", "images": ["81925", ...]}
    {"action": "undo"}

- *name*: a cluster's images get the name. Several clusters in one event are merged: they are one class. A cluster below
  a named one may have a name of its own, which counts for its images. The name "" takes a name away.
- *split*: the images that are listed become PATH.1, the others PATH.2, clusters as any other.
- *label*: single images; counts more than any cluster's name. The name "" takes the label away.
- *drop*, *keep*: dropped images get no label and are left out of all that follows; *keep* takes a drop back.
- *undo*: the last event that is neither an undo nor taken back already is taken back.
"""

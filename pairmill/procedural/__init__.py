"""Procedural pictures with captions of known truth, and a web that serves them.

- `scene`: seeded scenes of coloured shapes with exact boxes, rendered at any size.
- `captions`: captions of a scene, an oracle that judges any caption of the grammar, minimal false captions.
- `truth`: the same oracle for many scenes and captions at once, as numpy arrays.
- `answers`: an oracle that judges questions and answers about a scene.
- `web`: a loopback web server of such pictures with the faults, lies and copies of a real crawl.

Nothing here imports torch, ray or transformers.
"""

"""Shapes-VQA: a visual question answering task made by a seeded generator, and a small LLaVA-NeXT that was trained on it.

Scenes show one to five coloured shapes, some with a digit, on textures or photographs. Questions ask for a colour, a shape,
presence, a count, a relation or a digit; every answer is one word.
"""

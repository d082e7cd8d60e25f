"""Instruction data: conversations about images, written from texts and boxes."""

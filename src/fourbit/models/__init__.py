"""Language models in 4 bits: reading, quantizing and writing model folders, and the transformers plug-in."""

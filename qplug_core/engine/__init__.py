"""The reference engine: Hugging Face model definitions, qplug weights, generation. Read it in one sitting."""

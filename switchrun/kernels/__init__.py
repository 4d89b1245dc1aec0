"""Matrix products and packing: plain, int8 and nf4. Arithmetic alone; nothing here reads a file."""

"""`arabic-qwen plan CONFIG`: memory, speed and time of a run on this machine and on others, before anything is loaded."""

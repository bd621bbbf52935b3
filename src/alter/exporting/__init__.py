"""`alter export`: a model as the file that llama.cpp and Ollama read, an adapter as plain LoRAs."""

//! GGUF and safetensors files: header, metadata, tensor directory, memory mapping, writing

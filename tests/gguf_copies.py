"""What tests share that write a GGUF file anew by the `gguf` package: in parts, or aligned in another way."""

from gguf import GGUFReader, GGUFWriter


def write_copy(reader: GGUFReader, writer: GGUFWriter, **keys: str) -> None:
    """All that `reader` has, by a writer that knows the architecture; `keys` have other values, with _ for dots."""
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = keys.get(key.replace(".", "_"), field.contents())
            writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

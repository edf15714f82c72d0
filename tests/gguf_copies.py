"""What tests share that write a GGUF file anew by the `gguf` package: in parts, or aligned in another way."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter


def write_copy(reader: GGUFReader, writer: GGUFWriter, **keys: str) -> None:
    """All that `reader` has, by a writer that knows the architecture; `keys` have other values, with _ for dots."""
    copy_keys(reader, writer, **keys)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_keys(reader: GGUFReader, writer: GGUFWriter, **keys: str) -> None:
    """The metadata, as `write_copy` has it."""
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = keys.get(key.replace(".", "_"), field.contents())
            writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)


def fuse(source: Path, target: Path) -> Path:
    """The file with gate and up of each expert in one tensor, one behind the other."""
    reader = GGUFReader(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    copy_keys(reader, writer)
    for name, tensor in tensors.items():
        if ".ffn_gate_exps." in name:
            data = np.concatenate([tensor.data, tensors[name.replace("gate", "up")].data], 1)
            writer.add_tensor(name.replace("gate", "gate_up"), data, raw_dtype=tensor.tensor_type)
        elif ".ffn_up_exps." not in name:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target

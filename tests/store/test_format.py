"""The exact bytes of the format (docs/format.md)."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

from families import save_checkpoint
from moestro.config import PackOptions
from moestro.quant import make_encoding
from moestro.quant.flat import flat_encode
from moestro.store.dense_file import DenseSpec, dense_layout
from moestro.store.manifest import encode
from moestro.store.pack import pack
from packing import pack_raw
from store.test_manifest import quantised_manifest, small_manifest

_DENSE_HEAD = (
    "f800000000000000"  # 248 bytes of header
    "7b225f5f6d657461646174615f5f223a7b22666f726d6174223a227074227d2c"  # {"__metadata__":{"format":"pt"},
    "2261223a7b226474797065223a22463332222c227368617065223a5b335d2c22"  # "a":{"dtype":"F32","shape":[3],"
    "646174615f6f666673657473223a5b302c31325d7d2c226d6f657374726f2e70"  # data_offsets":[0,12]},"moestro.p
    "616464696e672e31223a7b226474797065223a225538222c227368617065223a"  # adding.1":{"dtype":"U8","shape":
    "5b35325d2c22646174615f6f666673657473223a5b31322c36345d7d2c226222"  # [52],"data_offsets":[12,64]},"b"
    "3a7b226474797065223a2242463136222c227368617065223a5b322c325d2c22"  # :{"dtype":"BF16","shape":[2,2],"
    "646174615f6f666673657473223a5b36342c37325d7d7d"  # data_offsets":[64,72]}}
) + "20" * 33

_MANIFEST = (
    '{"assets":[{"checksum":"0000000000000005","name":"config.json","nbytes":2}],"calibration":null,'
    '"checksum":"%s",'
    '"dense":{"lm_head.weight":["BF16",[2,1],192,4,"0000000000000004"]},"dense_bits":16,'
    '"dense_file":{"checksum":"0000000000000003","name":"dense.safetensors","nbytes":196},"dtype":"BF16",'
    '"encoding":"raw","exact_level":16,"format":"moestro-store",'
    '"layers":[{"experts":2,"layout":0,"module":"model.layers.0.mlp.experts"}],'
    '"layouts":[{"planes":[{"kind":"raw","level":16,"nbytes":4096,"tensors":[{"dtype":"BF16","group_size":null,'
    '"name":"w","nbytes":12,"offset":0,"shape":[2,3]}]}]}],"levels":[16],'
    '"model":{"model_type":"mixtral","rope":{"theta":10000.0}},'
    '"plane_files":[{"name":"experts.planes","nbytes":8192}],'
    '"planes":[[0,0,"0000000000000001"],[0,4096,"ffffffffffffffff"]],'
    '"source":{"fingerprint":"0123456789abcdef","ignored":["mtp.weight"],"quantisation":null},"version":2}'
)


def test_the_head_of_dense_safetensors() -> None:
    layout = dense_layout([DenseSpec("a", "F32", (3,)), DenseSpec("b", "BF16", (2, 2))])
    assert layout.head == bytes.fromhex(_DENSE_HEAD)
    assert [(place.offset, place.nbytes) for place in layout.places] == [(256, 12), (320, 8)]
    assert layout.nbytes == 328


def test_the_text_of_a_manifest() -> None:
    unsigned = _MANIFEST.replace('"checksum":"%s",', "", 1)
    signed = _MANIFEST % xxhash.xxh3_64_hexdigest(unsigned.encode())
    assert encode(small_manifest()) == signed.encode() + b"\n"
    assert '"checksum":"614e427cc7' in signed


_QUANTISED = (
    '"calibration":{"checksum":"000000000000000a","errors":[[[0.0625,0.001],[0.5,1e-06]]],"sensitivity":[1.5],'
    '"source":"sample.txt","tokens":16000,"unrouted":[[0,1]],"warnings":["odd"]}',
    '"dense":{"lm_head.weight":["flat8",[2,1],64,640,"0000000000000004"]},"dense_bits":8,',
    '"encoding":"nested","exact_level":4,',
    '"layouts":[{"planes":['
    '{"kind":"base","level":2,"nbytes":4096,"tensors":['
    '{"dtype":"nested","group_size":32,"name":"w","nbytes":256,"offset":0,"shape":[2,3]},'
    '{"dtype":"F32","group_size":null,"name":"b","nbytes":8,"offset":256,"shape":[2]}]},'
    '{"kind":"bit","level":3,"nbytes":4096,"tensors":['
    '{"dtype":"nested","group_size":32,"name":"w","nbytes":64,"offset":0,"shape":[2,3]}]},'
    '{"kind":"bit","level":4,"nbytes":4096,"tensors":['
    '{"dtype":"nested","group_size":32,"name":"w","nbytes":64,"offset":0,"shape":[2,3]}]}]}],',
    '"levels":[2,4],',
    '"plane_files":[{"name":"experts.planes","nbytes":24576}],',
)


def test_the_text_of_a_quantised_manifest() -> None:
    text = encode(quantised_manifest()).decode()
    for part in _QUANTISED:
        assert part in text


def _tiny_checkpoint(folder: Path) -> None:
    """One layer, two experts of width 2 in a model of width 4: values that bf16 holds and whose bytes one can tell."""
    config = MixtralConfig(
        vocab_size=2,
        hidden_size=4,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=8,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    layer = "model.layers.0."
    names = {
        "model.embed_tokens.weight": (2, 4),
        "lm_head.weight": (2, 4),
        "model.norm.weight": (4,),
        f"{layer}input_layernorm.weight": (4,),
        f"{layer}post_attention_layernorm.weight": (4,),
        f"{layer}block_sparse_moe.gate.weight": (2, 4),
        **{f"{layer}self_attn.{p}_proj.weight": (4, 4) for p in "qkvo"},
    }
    tensors = {name: torch.ones(shape) for name, shape in names.items()}
    for expert in range(2):
        prefix = f"{layer}block_sparse_moe.experts.{expert}"
        tensors[f"{prefix}.w1.weight"] = torch.arange(8.0).view(2, 4) + 100 * expert
        tensors[f"{prefix}.w3.weight"] = -torch.arange(8.0).view(2, 4)
        tensors[f"{prefix}.w2.weight"] = torch.arange(8.0).view(4, 2) / 2
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_the_bytes_of_planes(tmp_path: Path) -> None:
    _tiny_checkpoint(tmp_path / "source")
    store = pack_raw(tmp_path / "source", tmp_path / "store")
    gate_0 = "0000803f004040408040a040c040e040"  # 0 1 2 3 4 5 6 7
    gate_1 = "c842ca42cc42ce42d042d242d442d642"  # 100 ... 107
    up = "008080bf00c040c080c0a0c0c0c0e0c0"  # -0 -1 ... -7
    down = "0000003f803fc03f0040204040406040"  # 0 0.5 ... 3.5
    planes = (tmp_path / "store" / "experts.planes").read_bytes()
    assert len(planes) == 2 * 4096
    for expert, gate in enumerate((gate_0, gate_1)):
        wanted = (bytes.fromhex(gate + up).ljust(64, b"\0") + bytes.fromhex(down)).ljust(4096, b"\0")
        assert planes[4096 * expert : 4096 * (expert + 1)] == wanted
        assert store.plane((0, expert, 0)).checksum == xxhash.xxh3_64_intdigest(wanted)


def test_the_bytes_of_a_quantised_expert(tmp_path: Path) -> None:
    """Planes hold the regions of the encoding in the layout's places, and zeros; what is in a region is its matter."""
    model = save_checkpoint("gpt_oss", tmp_path / "source")
    options = PackOptions(levels="2,4", calibration=False)
    store = pack(tmp_path / "source", tmp_path / "store", options=options)
    weights = {name: param[3] for name, param in model.model.layers[0].mlp.experts.named_parameters()}
    encoding = make_encoding("nested")
    regions = {
        name: encoding.encode(weights[name].detach().t().contiguous(), levels=(2, 4))
        for name in ("gate_up_proj", "down_proj")
    }
    file = (tmp_path / "store" / "experts.planes").read_bytes()
    at = store.plane((0, 3, 0)).offset
    order = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    for plane, level in enumerate((2, 3, 4)):
        wanted = b""
        for name in order:
            if name in regions:
                wanted = wanted.ljust(-(-len(wanted) // 64) * 64, b"\0") + bytes(regions[name][level].tolist())
            elif level == 2:
                wanted = wanted.ljust(-(-len(wanted) // 64) * 64, b"\0") + weights[name].detach().numpy().tobytes()
        wanted = wanted.ljust(-(-len(wanted) // 4096) * 4096, b"\0")
        extent = store.plane((0, 3, plane))
        assert (extent.offset, extent.nbytes) == (at, len(wanted))
        assert file[at : at + len(wanted)] == wanted
        assert extent.checksum == xxhash.xxh3_64_intdigest(wanted)
        at += len(wanted)
    assert store.plane((0, 4, 0)).offset == at


def test_the_bytes_of_quantised_dense_weights(tmp_path: Path) -> None:
    model = save_checkpoint("gpt_oss", tmp_path / "source")
    store = pack(tmp_path / "source", tmp_path / "store", options=PackOptions(dense_bits=4, calibration=False))
    opened = load_file(store.dense_file)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert store.dense[name].dtype == "flat4"
    assert store.dense[name].shape == tuple(model.state_dict()[name].shape)
    assert opened[name].dtype == torch.uint8
    assert torch.equal(opened[name], flat_encode(model.state_dict()[name].float(), 4).view(-1))


def test_the_safetensors_library_opens_the_dense_file(tmp_path: Path) -> None:
    _tiny_checkpoint(tmp_path / "source")
    store = pack_raw(tmp_path / "source", tmp_path / "store")
    opened = load_file(store.dense_file)
    assert set(store.dense) == {name for name in opened if not name.startswith("moestro.padding.")}
    for name, tensor in opened.items():
        if name in store.dense:
            assert store.dense[name].offset % 64 == 0
            assert torch.equal(tensor.float(), torch.ones(store.dense[name].shape))
        else:
            assert not tensor.any()
    data = store.dense_file.read_bytes()
    head = data[: min(tensor.offset for tensor in store.dense.values())]
    assert store.manifest.dense_file.checksum == xxhash.xxh3_64_intdigest(head)
    for tensor in store.dense.values():
        assert tensor.checksum == xxhash.xxh3_64_intdigest(data[tensor.offset : tensor.offset + tensor.nbytes])


def test_the_files_of_a_store(tmp_path: Path) -> None:
    _tiny_checkpoint(tmp_path / "source")
    pack_raw(tmp_path / "source", tmp_path / "store")
    files = {path.name for path in (tmp_path / "store").iterdir()}
    assert files == {"config.json", "dense.safetensors", "experts.planes", "manifest.json", "origin.json"}

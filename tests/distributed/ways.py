"""Ways to train in several processes. Usage: ways.py FOLDER WAY...; tables go to FOLDER/<WAY>-<RANK>.safetensors."""

import sys
from pathlib import Path

import torch
from conftest import LENGTHS, VOCABULARY, tiny_bert_config
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_adacomp import AdaCompCallback, AdaCompConfig, calibrate, compress, pack

CONFIG = AdaCompConfig(LENGTHS, target_ratio=32, select_fraction=0.5)
STEPS = 8


class Stream(IterableDataset):
    """Rows that differ between processes."""

    def __iter__(self):
        draw = torch.Generator().manual_seed(dist.get_rank())
        while True:
            ids = torch.randint(0, VOCABULARY, (8,), generator=draw)
            yield {"input_ids": ids, "labels": ids[0] % 2}


def model_of_seed(seed: int) -> BertForSequenceClassification:
    set_seed(seed)
    return BertForSequenceClassification(tiny_bert_config(num_hidden_layers=1))


def by_trainer(folder: Path, **settings) -> dict[str, torch.Tensor]:
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **settings,
    )
    model = compress(model_of_seed(0), CONFIG)
    trainer = Trainer(model, arguments, train_dataset=Stream(), callbacks=[AdaCompCallback()])
    trainer.train()
    return model.get_input_embeddings().state_dict()


def loop(model: torch.nn.Module, table, wrapped: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = iter(Stream())
    for step in range(STEPS):
        batch = [next(rows) for _ in range(4)]
        wrapped(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
        table.step(step / STEPS, show_progress=False)
        optimizer.step()
        optimizer.zero_grad()


def by_hand(seed: int = 0, **settings) -> dict[str, torch.Tensor]:
    """DDP in a loop, the phases of the table included."""
    model = compress(model_of_seed(seed), CONFIG).train()
    table = model.get_input_embeddings()
    loop(model, table, DistributedDataParallel(model, **settings))
    table.check_ranks()
    table.pack()
    return table.state_dict()


def apart() -> dict[str, torch.Tensor]:
    """No DDP at all: each process trains a model of its own."""
    model = compress(model_of_seed(0), CONFIG).train()
    loop(model, model.get_input_embeddings(), model)
    return model.get_input_embeddings().state_dict()


def calibrated_by_one() -> dict[str, torch.Tensor]:
    """The first process calibrates, as it does whatever is done once; what it sends next is what the others get."""
    sent = torch.arange(3.0)
    if dist.get_rank() == 0:
        batches = [{"input_ids": torch.randint(VOCABULARY, (2, 8))}]
        pack(calibrate(compress(model_of_seed(0), CONFIG), batches, show_progress=False))
    dist.all_reduce(sent)
    assert sent.tolist() == [0, 2, 4]
    return {"sent": sent}


def sharded() -> dict[str, torch.Tensor]:
    """A packed model under FSDP2."""
    model = pack(compress(model_of_seed(0), CONFIG, torch.arange(VOCABULARY))).train()
    table = model.get_input_embeddings()
    before = {name: tensor.clone() for name, tensor in table.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    loop(model, table, model)
    gathered = {name: tensor.full_tensor().detach() for name, tensor in table.named_parameters()}
    assert not any(torch.equal(before[name], tensor) for name, tensor in gathered.items())
    return gathered


def sharded_in_training() -> dict[str, torch.Tensor]:
    """FSDP2 while the table is learned."""
    model = compress(model_of_seed(0), CONFIG).train()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    loop(model, model.get_input_embeddings(), model)
    return {}


BY_TRAINER = {
    "streams": {"accelerator_config": {"dispatch_batches": False}},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False},
}
BY_HAND = {
    "static_graph": lambda: by_hand(static_graph=True),
    "other_start": lambda: by_hand(seed=dist.get_rank()),
    "apart": apart,
    "calibrated_by_one": calibrated_by_one,
    "sharded": sharded,
    "sharded_in_training": sharded_in_training,
}


def main(folder: Path, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in ways:
        state = by_trainer(folder, **BY_TRAINER[way]) if way in BY_TRAINER else BY_HAND[way]()
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / f"{way}-{dist.get_rank()}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

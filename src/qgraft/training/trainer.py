"""LoraTrainer: transformers' Trainer with four things of ours.

    batches       padding-free, in parts of at most `max_tokens_per_pass` tokens; the loss is the mean over all label
                  tokens of an optimizer step, each times its weight, whatever the parts: sum w l / sum w
    checkpoints   only the adapter, optimizer, scheduler and generators; staged, sealed with a manifest, published by
                  one rename (transformers writes them in place: a kill leaves a folder that cannot be resumed)
    resuming      from the newest checkpoint whose manifest holds
    NaN           a step whose loss or gradient is not finite is skipped and counted; three in a row end the run
                  (transformers steps on NaN and logs 0.0)

Everything else (schedules, accumulation, clipping, optimizers, callbacks) is transformers' own.
"""

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qgraft import storage
from qgraft.adapter_files.folder import read_trained, save_adapter
from qgraft.adapters.attach import adapter_state_dict
from qgraft.data.batches import Batch, collate, split_batch, weigh_labels
from qgraft.data.tokenizing import Sample
from qgraft.errors import CheckpointError, TrainingError
from qgraft.kernels.lora import casts_kept
from qgraft.memory.budget import evaluation_tokens
from qgraft.passes.loss import batch_loss, check_gradient
from qgraft.training.arguments import TrainArguments
from qgraft.training.evaluate import evaluate_samples

MAX_SKIPPED_IN_A_ROW = 3
UNCLIPPED = 1e38  # a norm that no gradient reaches
OPTIMIZER = "optimizer.pt"  # what transformers calls the optimizer's state in a checkpoint
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class LoraTrainer(Trainer):
    """Trains the active adapter of a model on samples; see the module's docstring."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainArguments,
        samples: list[Sample],
        eval_samples: list[Sample],
        tokens_per_pass: int,
        callbacks: list[Any],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=samples,
            eval_dataset=eval_samples or None,
            callbacks=callbacks,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.tokens_per_pass = tokens_per_pass
        self.tokens_seen = 0  # in this process
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        if not self.args.max_grad_norm:  # no clipping; but it is there that NaN is looked for
            self.args.max_grad_norm = UNCLIPPED
        self._staging: Path | None = None
        self._flos_per_token: int | None = None
        self._gradients: _Gradients | None = None  # during train()

    # --- a step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As usual, with all gradients in one tensor."""
        model = cast(nn.Module, self.model)
        self._gradients = _Gradients([p for p in model.parameters() if p.requires_grad])
        model.zero_grad = self._gradients.clear  # type: ignore[method-assign]
        model.zero_grad()
        try:
            return super().train(*args, **kwargs)
        finally:
            del model.zero_grad

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        return torch.tensor(sum(weigh_labels(batch) for batch in batch_samples)).to(device, non_blocking=True)

    def get_train_dataloader(self) -> Any:
        """As usual, but batches stay on the CPU: label_states moves them."""
        placed, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placed

    def training_step(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of one batch, part by part. Returns its share of the step's mean loss."""
        if not model.training:  # the walk over all modules costs milliseconds
            model.train()
        batch = inputs  # stays on the CPU, see label_states
        self.tokens_seen += batch["input_ids"].numel()
        assert num_items_in_batch is not None
        loss = self.learn(model, split_batch(batch, self.tokens_per_pass), num_items_in_batch)
        self._finite = self._finite & torch.isfinite(loss)
        return loss

    def learn(self, model: PreTrainedModel, parts: list[Batch], labels: Tensor) -> Tensor:
        """Forward and backward of the parts of a batch, the loss divided by `labels`; not finite where a part's is not.

        A GPU is not waited for between two parts: gradients of a loss that is not finite go with the step (`_guard`).
        """
        with casts_kept():
            return self._learn(model, parts, labels)

    def _learn(self, model: PreTrainedModel, parts: list[Batch], labels: Tensor) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        for part in parts:
            with self.compute_loss_context_manager():
                loss = batch_loss(model, part, self.args.label_smoothing_factor) / labels
            check_gradient(model, loss)
            if not loss.is_cuda and not torch.isfinite(loss):
                return total.fill_(float("nan"))
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _clip_grad_norm(self, model: PreTrainedModel) -> Tensor:
        """Clip as usual; a step with NaN or infinity anywhere leaves no gradient, so the optimizer does nothing."""
        assert self._gradients is not None
        norm = super()._clip_grad_norm(self._gradients.whole)
        scaled = self.accelerator.scaler is not None  # the scaler of float16 runs skips and counts on its own
        if not scaled:
            self._guard(model, norm)
        return norm

    def _guard(self, model: PreTrainedModel, norm: Tensor | float) -> None:
        finite = bool(self._finite & torch.isfinite(torch.as_tensor(norm)))
        self._finite = torch.ones_like(self._finite)
        if finite:
            self._skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        for parameter in model.parameters():
            parameter.grad = None
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"step {self.state.global_step}: loss or gradient was NaN or infinite {MAX_SKIPPED_IN_A_ROW} times "
                "in a row; the adapter was not changed by these steps",
                hint="lower learning_rate, or resume from the last checkpoint; look for broken rows in the dataset",
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers counts them, but the parameters once: counting takes as long as the optimizer."""
        if self._flos_per_token is None:
            ids = {"input_ids": inputs["input_ids"][:, :1]}
            self._flos_per_token = super().floating_point_ops(ids)
        return self._flos_per_token * int(inputs["input_ids"].numel())

    # --- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss over all label tokens of the held-out samples."""
        result = evaluate_samples(self.model, eval_dataset or self.eval_dataset, evaluation_tokens(self.args))
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in result.as_dict().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        save_adapter(self.model, output_dir or self.args.output_dir, self.args.adapter_name)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with storage.publish_folder(folder / name) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)  # writes staging/checkpoint-N
            finally:
                self._staging = None
            for path in (staging / name).iterdir():
                path.rename(staging / path.name)
            (staging / name).rmdir()
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(str(staging / "trainer_state.json"))
        self._rotate(folder)

    def _rotate(self, folder: Path) -> None:
        """Delete the oldest checkpoints beyond save_total_limit, never the best one."""
        if not self.args.save_total_limit:
            return
        best = self.state.best_model_checkpoint
        old = [path for path in checkpoints(folder)[: -self.args.save_total_limit] if str(path) != best]
        for path in old:
            storage.remove_folder(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        saved = read_trained(Path(resume_from_checkpoint))
        current = adapter_state_dict(self.model, self.args.adapter_name)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in current.items()}:
            raise CheckpointError(
                f"{resume_from_checkpoint} holds another adapter: {len(saved)} tensors of other names or shapes "
                f"than the {len(current)} of this run",
                hint="resume with the same options of the adapter, or start anew with another output_dir",
            )
        with torch.no_grad():
            for key, tensor in saved.items():
                current[key].copy_(tensor)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Gradients:
    """The gradients of all trained parameters as views of one tensor, which is cleared and clipped as a whole.

    Tensors of their own, made anew in each step, take milliseconds to clear and to clip, and lie all over the heap, where
    nothing large fits between them: the process then grows by a tenth of a gigabyte. A parameter that a step does not
    reach has a gradient of zeros, not none: weight decay and momentum go on.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        assert len(kinds) == 1, f"trained parameters of several kinds: {kinds}"
        tensor = nn.Parameter(parameters[0].new_zeros(sum(parameter.numel() for parameter in parameters)))
        tensor.grad = tensor.detach()
        self.whole = nn.ParameterList([tensor])
        parts = tensor.grad.split([parameter.numel() for parameter in parameters])
        self._views = [(parameter, part.view_as(parameter)) for parameter, part in zip(parameters, parts, strict=True)]

    def clear(self, set_to_none: bool = True) -> None:
        """As zero_grad of the model. The gradients are zeros either way."""
        gradient = self.whole[0].grad
        assert gradient is not None
        gradient.zero_()
        for parameter, view in self._views:
            parameter.grad = view


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, oldest step first."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose manifest holds, and a sentence for each newer one that was passed over."""
    passed_over: list[str] = []
    for retired in folder.glob(".checkpoint-*.old-*"):  # killed while a checkpoint was being replaced
        storage.recover_folder(folder / retired.name[1:].partition(".old-")[0])
    for path in reversed(checkpoints(folder)):
        problems = storage.check_folder(path)
        if not problems:
            return path, passed_over
        passed_over.append(f"{path} is not whole and was passed over: {problems[0]}")
    return None, passed_over


def check_resumable(path: Path) -> None:
    """Raise CheckpointError for a checkpoint of save_only_model: going on from it would begin the optimizer anew."""
    if not (path / OPTIMIZER).is_file():
        raise CheckpointError(
            f"{path} holds an adapter without {OPTIMIZER} (save_only_model), so a run cannot go on from it",
            hint="--adapter_name_or_path takes its adapter for a new run",
        )

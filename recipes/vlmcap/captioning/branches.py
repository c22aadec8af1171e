"""Captions as branches of one sequence: an image and its prompt run once for all beams, or all samples, of a caption.

Stock `generate` repeats the prompt for every beam, and moves the whole cache at every step to follow the beams. Here a
picture has one row of the cache:

    image and prompt | step 1: beam 1, beam 2, beam 3 | step 2: beam 1, beam 2, beam 3 | ...

Each step appends one entry a beam. A mask lets a beam see the prefix and its own ancestors. When beams are chosen,
rows of the mask are gathered; nothing in the cache moves. A picture whose caption is complete leaves the batch, and
the next picture takes its row (continuous batching).

The search is that of transformers (`GenerationMixin._beam_search`, `_sample`), picture by picture: the same
candidates, length penalty and stopping rules. tests/invariants/test_branches.py compares it token for token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from transformers import (
    BatchFeature,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmcap.models.load import MASKED_ATTENTION, MODEL_TYPES, base_model

NEVER = -1e9  # score of what cannot be chosen, as in transformers
GROUPED = "grouped_queries"  # name of `grouped_attention` in transformers
# Images and prompts of so many tokens run at once. On a CPU more is slower: activations leave its caches.
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 1024, 512


def supports_branches(model: PreTrainedModel) -> bool:
    """Whether the engine knows the architecture and the attention implementation of a model."""
    attention = base_model(model).config.get_text_config()._attn_implementation
    return base_model(model).config.model_type in MODEL_TYPES and attention in MASKED_ATTENTION


@dataclass
class Caption:
    """What the engine found for a picture and an ending of its prompt.

    tokens: int64, (R, T), padded, the best first.
    scores: float32, (R,): sums of log-probabilities over length ** length_penalty; zeros without beams.
    """

    number: int
    tokens: torch.Tensor
    scores: torch.Tensor
    ending: int = 0


class BranchLayer(CacheLayerMixin):
    """Keys and values of one layer: (rows, heads, capacity, width of a head)."""

    def __init__(self, cache: "BranchCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros((self.cache.rows, states.shape[1], 0, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def grow(self, capacity: int) -> None:
        more = capacity - self.keys.shape[2]
        if more > 0:
            self.keys, self.values = (nn.functional.pad(kept, (0, 0, 0, more)) for kept in (self.keys, self.values))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        places, width = self.cache.places, self.cache.width
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.keys[rows, :, places] = key_states.transpose(1, 2)
        self.values[rows, :, places] = value_states.transpose(1, 2)
        return self.keys[: len(places), :, :width], self.values[: len(places), :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_max_length(self) -> int:
        return -1


class BranchCache(Cache):
    """One row a picture, the first of them in use. Before a forward are set: `places`, the entries that the new tokens
    get (int64, (B, K)), and `width`, how many entries are looked at."""

    def __init__(self, layers: int, rows: int):
        self.rows, self.places, self.width = rows, None, 0
        super().__init__(layers=[BranchLayer(self) for _ in range(layers)])

    def append(self, row: int, prefixes: DynamicCache, mask: torch.Tensor, branches: int) -> None:
        """Copies prefixes, without their padding (mask: int64, (n, P)), into the rows from `row` on; `branches`:
        entries that will come after them at most."""
        lengths = mask.sum(1).tolist()
        for layer, new in zip(self.layers, prefixes.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(new.keys, new.values)
            layer.grow(max(lengths) + branches)
            for index, seen in enumerate(mask.bool()):
                length = lengths[index]
                layer.keys[row + index, :, :length] = new.keys[index, :, seen]
                layer.values[row + index, :, :length] = new.values[index, :, seen]

    def move(self, source: int, target: int) -> None:
        for layer in self.layers:
            layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]


@dataclass
class Rows:
    """The captions in work, B of them with K branches each: what the next step needs to know.

    Attributes:
        number: of each picture, times the number of endings, plus that of the ending; int64, (B,).
        prompt: token ids of each prefix, padded with -1, int64, (B, P).
        prefix, step, position: entries of the prefix, tokens written, position of the next token; int64, (B,).
        visible: entries of the cache that a branch sees, bool, (B, K, C).
        logits: of the next token, float32, (B, K, V).
        tokens, scores: of the running branches, int64, (B, K, T), and float32, (B, K).
        best, best_scores, ended: the complete captions found so far; ended: bool, (B, K). Sampled branches, which end
            each by itself, have no `best`.
        hope: whether a running beam can still become better than the worst complete one, bool, (B, 1).
        draws: of samples, the uniform number that chooses each token, float32, (B, K, T); (B, K, 0) without samples.
    """

    number: torch.Tensor
    prompt: torch.Tensor
    prefix: torch.Tensor
    step: torch.Tensor
    position: torch.Tensor
    visible: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    best: torch.Tensor
    best_scores: torch.Tensor
    ended: torch.Tensor
    hope: torch.Tensor
    draws: torch.Tensor

    def __len__(self) -> int:
        return len(self.number)

    def select(self, index: torch.Tensor) -> "Rows":
        return Rows(**{name: value[index] for name, value in vars(self).items()})

    def join(self, other: "Rows") -> "Rows":
        pads = {"prompt": -1, "visible": False}
        joined = {}
        for name, mine in vars(self).items():
            pair = [mine, getattr(other, name)]
            if name in pads:
                width = max(part.shape[-1] for part in pair)
                left = name == "prompt"
                pair = [
                    nn.functional.pad(
                        part, (width - part.shape[-1], 0) if left else (0, width - part.shape[-1]), value=pads[name]
                    )
                    for part in pair
                ]
            joined[name] = torch.cat(pair)
        return Rows(**joined)


class BranchGenerator:
    """Captions of a stream of pictures by beam search, greedily or by sampling.

    Args:
        model: of MODEL_TYPES, perhaps with an adapter, in evaluation mode.
        config: num_beams, or do_sample with num_return_sequences, temperature, top_k and top_p; max_new_tokens,
            length_penalty, early_stopping, repetition_penalty; eos_token_id and pad_token_id.
        limits: processors of the scores; they are given the tokens of the captions alone.
        rows: captions in work at once (of as many pictures, unless there are several endings).
        generator: of the samples.
        endings: token ids that end the prompt, for several prompts of each picture: what they begin with, the picture
            too, runs once for all. A picture gets a caption for each ending.
        draws: of the samples instead, which then do not depend on which pictures are in work together: number
            of a picture -> uniform numbers in [0, 1), float32, (num_return_sequences, max_new_tokens).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        limits: LogitsProcessorList,
        rows: int,
        generator: torch.Generator | None = None,
        endings: Sequence[list[int]] = ((),),
        draws: Callable[[int], torch.Tensor] | None = None,
    ):
        self.model, self.config, self.limits, self.endings = model, config, limits, endings
        self.generator, self.draws = generator, draws
        self.rows = max(rows, len(endings))
        self.inner, self.device = base_model(model), model.device
        self.text = self.inner.config.get_text_config()
        # FlexAttention is compiled for the shape of its mask, and that changes with every step.
        own = self.text._attn_implementation
        self.prefill_attention = "sdpa" if own == "flex_attention" else own
        self.returned = config.num_return_sequences or 1
        self.branches = self.returned if config.do_sample else config.num_beams
        ends = config.eos_token_id
        self.ends = torch.tensor([ends] if isinstance(ends, int) else ends, device=self.device)
        self.pad = config.pad_token_id or int(self.ends[0])
        penalty = config.length_penalty
        powers = [float(length) ** penalty for length in range(1, config.max_new_tokens + 1)]
        self.powers = torch.tensor([1.0, *powers], dtype=torch.float32, device=self.device)  # by length
        self.repetition = (
            RepetitionPenaltyLogitsProcessor(config.repetition_penalty) if config.repetition_penalty != 1.0 else None
        )
        self.warpers = sampling_warpers(config) if config.do_sample else LogitsProcessorList()
        self.cache, self.work = BranchCache(self.text.num_hidden_layers, self.rows), None

    def run(self, pictures: Iterable[dict]) -> Iterator[Caption]:
        """Captions, each as soon as it is complete; `Caption.number` counts the pictures from 0.

        Args:
            pictures: what the processor makes of one picture with its prompt: input_ids, (1, P), and so on.
        """
        numbered = enumerate(pictures)
        while group := list(islice(numbered, self.free)):
            self.add(group)
            while self.work and not self.has_room:
                yield from self.step()
        while self.work:
            yield from self.step()

    @property
    def free(self) -> int:
        """How many more pictures can be taken into work."""
        return (self.rows - (len(self.work) if self.work else 0)) // len(self.endings)

    @property
    def has_room(self) -> bool:
        """Whether enough rows are free for another prefill: several pictures at once are faster than one at a time."""
        return self.free >= max(1, self.rows // 4 // len(self.endings))

    @torch.inference_mode()
    def add(self, group: list[tuple[int, dict]]) -> None:
        """Takes pictures into work, `free` at most: (number, inputs) of each."""
        for few in prefills(group, self.device):
            with attention(self.text, self.prefill_attention):
                new = self._prefill(few)
            self.work = self.work.join(new) if self.work else new

    @torch.inference_mode()
    def step(self) -> list[Caption]:
        """Writes one token of every caption in work, and returns those that are complete."""
        parents, done = self._choose(self.work)
        complete = self._captions(self.work.select(done.nonzero()[:, 0]))
        self.work = self._compact(self.work, parents, done)
        if self.work:
            with attention(self.text, GROUPED):
                self._forward(self.work)
        return complete

    def _prefill(self, group: list[tuple[int, dict]]) -> Rows:
        """Runs images and prompts of new pictures, once each, and puts them into rows after those in work."""
        inputs = _batched([one for _, one in group]).to(self.device)
        prefixes = DynamicCache()
        with last_position_alone(self.inner.model.language_model.layers[-1].mlp):
            outputs = self.model(**inputs, past_key_values=prefixes, use_cache=True, logits_to_keep=1)
        ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], outputs.logits[:, -1:]
        # Positions of text are those in the prompt plus what the picture takes less than its tokens.
        shift = self.inner.model.rope_deltas[:, 0].to(self.device)
        if any(self.endings):
            ids, mask, shift, logits = self._end_prompts(ids, mask, shift, prefixes)
        count, kept, longest = len(ids), self.branches, self.config.max_new_tokens
        self.cache.append(len(self.work) if self.work else 0, prefixes, mask, kept * longest)
        prefix = mask.sum(1)
        capacity = int(prefix.max()) + kept * longest
        visible = torch.arange(capacity, device=self.device) < prefix[:, None]
        tokens = torch.full((count, kept, longest), self.pad, device=self.device)
        scores = torch.full((count, kept), NEVER, device=self.device)
        first = torch.arange(kept, device=self.device) == 0  # else all beams would begin alike
        several = len(self.endings)
        numbers = [number * several + ending for number, _ in group for ending in range(several)]
        return Rows(
            number=torch.tensor(numbers, device=self.device),
            prompt=ids.masked_fill(mask == 0, -1),
            prefix=prefix,
            step=torch.zeros_like(prefix),
            position=prefix + shift,
            visible=visible[:, None].repeat(1, kept, 1),
            logits=logits.float().repeat(1, kept, 1),
            tokens=tokens,
            scores=torch.where(first, 0.0, scores),
            best=tokens.clone(),
            best_scores=scores,
            ended=torch.zeros((count, kept), dtype=torch.bool, device=self.device),
            hope=torch.ones((count, 1), dtype=torch.bool, device=self.device),
            draws=self._draw(numbers).to(self.device),
        )

    def _draw(self, numbers: list[int]) -> torch.Tensor:
        """`Rows.draws` of new pictures."""
        shape = (self.branches, self.config.max_new_tokens if self.config.do_sample else 0)
        if self.draws is None or not self.config.do_sample:
            device = self.generator.device if self.generator else self.device
            return torch.rand((len(numbers), *shape), generator=self.generator, device=device)
        return torch.stack([self.draws(number) for number in numbers])

    def _end_prompts(
        self, ids: torch.Tensor, mask: torch.Tensor, shift: torch.Tensor, prefixes: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the endings after what all prompts of a picture begin with: ids, mask, shift, logits of each prompt.

        Args:
            ids, mask, shift: of the prefixes; int64, (n, P), (n, P) and (n,).
            prefixes: their cache; it becomes that of the prompts, n times as many as there are endings.
        """
        pictures, several = len(ids), len(self.endings)
        endings = [torch.tensor(ending, dtype=torch.long, device=self.device) for ending in self.endings]
        lengths = torch.tensor(list(map(len, endings)), device=self.device).repeat(pictures)
        endings = nn.utils.rnn.pad_sequence(endings, batch_first=True).repeat(pictures, 1)
        ids, mask, shift = (value.repeat_interleave(several, 0) for value in (ids, mask, shift))
        prefixes.batch_repeat_interleave(several)
        steps = torch.arange(endings.shape[1], device=self.device)
        position = (mask.sum(1) + shift)[:, None] + steps
        ids, mask = torch.cat([ids, endings], 1), torch.cat([mask, (steps < lengths[:, None]).long()], 1)
        outputs = self.model(
            input_ids=endings,
            position_ids=position.expand(3, -1, -1),
            attention_mask=mask,
            past_key_values=prefixes,
            use_cache=True,
        )
        logits = outputs.logits[torch.arange(len(ids), device=self.device), lengths - 1]
        return ids, mask, shift, logits[:, None]

    def _limited(self, work: Rows, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, (B, K, V), after the limits; these look at what was written."""
        if not self.limits and self.repetition is None:
            return scores
        limited = []
        for row, step in enumerate(work.step.tolist()):
            written = work.tokens[row, :, :step]
            one = scores[row]
            if self.repetition is not None:
                prompt = work.prompt[row][work.prompt[row] >= 0].expand(len(written), -1)
                one = self.repetition(torch.cat([prompt, written], dim=1), one)
            limited.append(self.limits(written, one))
        return torch.stack(limited)

    def _choose(self, work: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of every branch, in `work`; returns whose branch each one continues, int64, (B, K), and which
        pictures are done, bool, (B,)."""
        choose = self._choose_sampled if self.config.do_sample or self.branches == 1 else self._choose_beams
        parents, done = choose(work)
        work.step += 1
        return parents, done

    def _choose_sampled(self, work: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._limited(work, work.logits)
        batch, kept, vocabulary = scores.shape
        if self.config.do_sample:
            # The token whose share of the line from 0 to 1 holds the number drawn for it. In float64: the float32 sum
            # of a vocabulary of 150,000 loses the rare tokens.
            flat = self.warpers(None, scores.flatten(0, 1))
            sums = flat.softmax(-1, dtype=torch.float64).cumsum(-1)
            drawn = work.draws.gather(2, work.step[:, None, None].expand(-1, kept, 1)).view(-1, 1)
            chosen = torch.searchsorted(sums, drawn * sums[:, -1:], right=True).view(batch, kept)
        else:
            chosen = scores.argmax(-1)
        chosen = chosen.masked_fill(work.ended, self.pad)
        work.tokens.scatter_(2, work.step[:, None, None].expand(-1, kept, 1), chosen[:, :, None])
        work.ended |= torch.isin(chosen, self.ends)
        done = work.ended.all(1) | (work.step + 1 == self.config.max_new_tokens)
        return torch.arange(kept, device=self.device).expand(batch, -1), done

    def _choose_beams(self, work: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of `GenerationMixin._beam_search` in transformers 5.23, for pictures of different lengths at once."""
        batch, kept, vocabulary = work.logits.shape
        rows, early = torch.arange(batch, device=self.device)[:, None], self.config.early_stopping
        last = (work.step + 1 == self.config.max_new_tokens)[:, None]
        scores = self._limited(work, work.logits.log_softmax(-1)) + work.scores[:, :, None]
        # Enough candidates that as many beams as before continue, even if all the best ones end here.
        candidates = max(2, 1 + len(self.ends)) * kept
        scores, index = scores.flatten(1).topk(candidates)
        parents, chosen = index // vocabulary, index % vocabulary
        tokens = work.tokens[rows, parents]
        tokens.scatter_(2, work.step[:, None, None].expand(-1, candidates, 1), chosen[:, :, None])
        ends = torch.isin(chosen, self.ends) | last

        # What continues.
        running = scores + ends.float() * NEVER
        order = running.topk(kept)[1]
        work.tokens, work.scores = tokens[rows, order], running[rows, order]
        continuing = parents[rows, order]

        # What is complete: only the best `kept` candidates count, against those found before.
        complete = ends & (torch.arange(candidates, device=self.device) < kept)
        scores = scores / self.powers[work.step + 1][:, None]
        full = work.ended.all(1, keepdim=True) & (early is True)
        scores = scores + full.float() * NEVER + (~work.hope).float() * NEVER + (~complete).float() * NEVER
        merged = torch.cat([work.best_scores, scores], dim=1)
        order = merged.topk(kept)[1]
        work.best = torch.cat([work.best, tokens], dim=1)[rows, order]
        work.ended = torch.cat([work.ended, complete], dim=1)[rows, order]
        work.best_scores = merged[rows, order]

        # Can the best running beam still win?
        longest = early == "never" and self.config.length_penalty > 0.0
        lengths = torch.full_like(work.step, self.config.max_new_tokens) if longest else work.step + 1
        possible = work.scores[:, :1] / self.powers[lengths][:, None]
        worst = torch.where(work.ended, work.best_scores.min(1, keepdim=True)[0], NEVER)
        work.hope &= (possible > worst).any(1, keepdim=True)
        done = ~work.hope[:, 0] | (work.ended.all(1) & (early is True)) | ends.all(1)
        return continuing, done

    def _captions(self, complete: Rows) -> list[Caption]:
        tokens, scores = complete.best, complete.best_scores
        if self.config.do_sample or self.branches == 1:
            tokens, scores = complete.tokens, torch.zeros_like(scores)
        found = zip(complete.number.tolist(), tokens, scores, strict=True)
        several, kept = len(self.endings), self.returned
        return [
            Caption(number // several, texts[:kept], best[:kept], number % several) for number, texts, best in found
        ]

    def _compact(self, work: Rows, parents: torch.Tensor, done: torch.Tensor) -> Rows | None:
        """The pictures that are not done, in the first rows; their branches see what their parents saw."""
        work.visible = work.visible.gather(1, parents[:, :, None].expand_as(work.visible))
        left = (~done).nonzero()[:, 0].tolist()
        order = left[:]
        for row in range(len(left)):  # a hole in front is filled from the end
            if done[row]:
                source = order.pop()
                self.cache.move(source, row)
                order.insert(row, source)
        return work.select(torch.tensor(order, device=self.device)) if left else None

    def _forward(self, work: Rows) -> None:
        """Runs the tokens that were chosen last, a token a branch, and puts the next logits into `work`."""
        cache, kept = self.cache, torch.arange(self.branches, device=self.device)
        cache.places = work.prefix[:, None] + (work.step[:, None] - 1) * self.branches + kept
        cache.width = int(cache.places.max()) + 1
        work.visible.scatter_(2, cache.places[:, :, None], True)
        newest = work.tokens.gather(2, (work.step - 1)[:, None, None].expand(-1, self.branches, 1))[:, :, 0]
        position = (work.position + work.step - 1)[:, None].expand(-1, self.branches)
        outputs = self.model(
            input_ids=newest,
            position_ids=position.expand(3, -1, -1),
            attention_mask=work.visible[:, None, :, : cache.width],
            past_key_values=cache,
            use_cache=True,
        )
        work.logits = outputs.logits.float()


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """scaled_dot_product_attention in which the query heads that share a key head are more queries of that head.

    transformers repeats keys and values for every query head where there is a mask; with few queries and a long cache
    copying takes longer than attention.

    Args:
        query: (B, H, K, D). key, value: (B, G, L, D); H is a multiple of G. attention_mask: bool, (B, 1, K, L).

    Returns:
        (B, K, H, D), as transformers expects it.
    """
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, groups, -1, width),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, heads // groups, 1),
        scale=scaling,
    )
    return output.reshape(batch, heads, queries, width).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)


@contextmanager
def attention(config: PreTrainedConfig, implementation: str) -> Iterator[None]:
    """Within it a language model attends by that implementation."""
    own = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = own


@contextmanager
def last_position_alone(mlp: nn.Module) -> Iterator[None]:
    """Within it the feed-forward of the last layer is computed for the last position, the only one whose output is
    looked at. That of the others is wrong: transformers adds the one row to all."""
    hook = mlp.register_forward_pre_hook(lambda module, args: (args[0][:, -1:],))
    try:
        yield
    finally:
        hook.remove()


def prefills(group: list[tuple[int, dict]], device: torch.device) -> Iterator[list[tuple[int, dict]]]:
    """Parts of a group that are run at once: of PREFILL_TOKENS at most (CPU_PREFILL_TOKENS), unless one has more."""
    few, tokens = [], 0
    most = CPU_PREFILL_TOKENS if device.type == "cpu" else PREFILL_TOKENS
    for number, one in group:
        more = one["input_ids"].shape[1]
        if few and tokens + more > most:
            yield few
            few, tokens = [], 0
        few.append((number, one))
        tokens += more
    if few:
        yield few


def sampling_warpers(config: GenerationConfig) -> LogitsProcessorList:
    """temperature, top_k and top_p of a configuration, in the order of transformers."""
    warpers = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


def _batched(group: list[dict]) -> BatchFeature:
    """Inputs of single pictures as one batch, prompts padded on the left."""
    length = max(one["input_ids"].shape[1] for one in group)

    def joined(name: str) -> torch.Tensor:
        parts = [one[name] for one in group]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            parts = [nn.functional.pad(part, (length - part.shape[1], 0)) for part in parts]
        return torch.cat(parts)

    return BatchFeature({name: joined(name) for name in group[0]})

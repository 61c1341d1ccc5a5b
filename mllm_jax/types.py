"""The values that flow between data, model, training and generation, and the shape legend.

Legend, used in einsums, comments and docstrings of all files:

    B batch rows          T query positions     S key positions       V vocabulary
    R patch rows per batch row                  P patches in a patch row
    M visual tokens of a batch row              C values in a patch
    I slots for the images of a patch row       Q queries, which are the visual tokens of an image
    W tokens of an image's instruction
    D width     N heads     K key-value heads     G = N / K     H head dim     F mlp width     L layers
    E experts   k experts that a token chooses          Z values of a latent

Every value is a NamedTuple: a pytree for jax and a plain tuple of arrays for numpy, so that data workers
can build batches without importing jax. Fields hold numpy or jax arrays.
"""

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray on the host, jax.Array inside jit


class ImagePatches(NamedTuple):
    """One image, or one temporal patch (a few consecutive frames) of a video: contiguous, and attended in full."""

    patches: Array  # u8[p C] raw pixels or f32[p C] normalized; merge-block-major, values in (c, t, y, x) order
    grid: tuple[int, int]  # (h, w) in patches; p = h * w, and before them `num_prefix_tokens` empty ones
    time: int = 0  # index of the temporal patch within its video
    shows_prefix_tokens: bool = False  # whether the tokens in those places are visual tokens too, the first ones
    instruction: Array | None = None  # i32[w] tokens of the text that the connector reads with it

    @property
    def num_prefix_tokens(self) -> int:
        """Empty patches before the first: places for the class token and the registers of an encoder."""
        return len(self.patches) - self.grid[0] * self.grid[1]

    @property
    def hidden(self) -> int:
        """Patches before the first one that visual tokens are made of."""
        return 0 if self.shows_prefix_tokens else self.num_prefix_tokens

    @property
    def shown(self) -> int:
        """Patches that visual tokens are made of."""
        return len(self.patches) - self.hidden

    @property
    def instruction_length(self) -> int:
        """Number of tokens of its instruction."""
        return 0 if self.instruction is None else len(self.instruction)

    def num_tokens(self, merge: int, queries: int = 0) -> int:
        """Number of visual tokens: `queries`, or where that is 0 one of every merge x merge patches."""
        return queries or self.shown // merge**2


class TokenBlend(NamedTuple):
    """Weighted means of four visual tokens, for a resampled grid; it accompanies the index of visual tokens."""

    index: Array  # i32[... 3] three more of each, counted like the first
    weight: Array  # f32[... 4] of the first and of these; they sum to 1


class VisionSpan(NamedTuple):
    """One image or video as a person gave it: a run of m visual tokens in the text."""

    images: tuple[ImagePatches, ...]  # itself, its tiles, or its temporal patches
    order: Array  # i32[m] indices of visual tokens among those of `images`, joined in order; NEWLINE
    position: Array  # i32[m 3] rotary positions (t, y, x), counted from the first
    advance: int  # rotary position of what follows, counted from the first
    mix: TokenBlend | None = None  # blend of `order`. None: no blend


NEWLINE = -2  # the connector's learned token that ends a row of patches


class Example(NamedTuple):
    """One processed conversation, before packing, or several about the same images. n tokens, m of them visual."""

    tokens: Array  # i32[n]
    weight: Array  # f32[n] loss weight of predicting tokens[i] (from what comes before it)
    position: Array  # i32[n 3] rotary position (t, y, x)
    vision_index: Array  # i32[n] which of the visual tokens of `images`, laid end to end; -1 = text; NEWLINE
    images: tuple[ImagePatches, ...]
    kind: str = ""  # the kind of question or the task, for reports
    prefix: int = 0  # number of first tokens that all tokens of the conversation attend to, in models with a prefix
    mix: TokenBlend | None = None  # blend of `vision_index`, [n ...]. None: no blend
    lengths: tuple[int, ...] = ()  # tokens of each of several conversations, laid end to end; () = it is one
    reference: Array | None = None  # f32[conversations] log-probabilities that a reference model gives their answers
    notes: tuple[str, ...] = ()  # what was left out of the record, in words that are counted

    @property
    def visual(self) -> Array:
        """bool[n] tokens that are replaced by visual tokens."""
        return self.vision_index != -1


class Vision(NamedTuple):
    """Packed images. An image is contiguous in one patch row; several share a row."""

    patches: Array  # u8 or f32 [B R P C]
    image: Array  # i32[B R P] number of the image that a patch belongs to, 1.. within a batch row; 0 = padding
    coords: Array  # i32[B R P 3] (t, y, x) in patches; t = -1, -2, ... in the empty ones that lead an image
    grid: Array  # i32[B R P 2] (h, w) of a patch's image, in patches; 1 at padding
    slots: Array | None = None  # i32[B R I] numbers of a patch row's images, for connectors with queries; 0: no image
    instruction: Array | None = None  # i32[B R I W] tokens of the text that belongs to each of them; -1: padding


class Experience(NamedTuple):
    """PPO's data of the model's answers, f32[B T] per target; see train/losses/ppo.py."""

    log_probs: Array  # that the model gave it
    values: Array  # what the critic expected before it
    advantages: Array  # how much better it was than expected, whitened
    returns: Array  # what the critic should have expected


class Batch(NamedTuple):
    """Packed rows of T tokens: several conversations in a row, one `segment` number each."""

    tokens: Array  # i32[B T]
    targets: Array  # i32[B T] the next token of the same conversation
    weight: Array  # f32[B T] loss weight of a target; 0 for padding and at the end of a conversation
    segment: Array  # i32[B T] 1.. within a row; 0 = padding
    position: Array  # i32[B T 3] rotary position (t, y, x), restarting in each conversation
    vision_index: Array  # i32[B T] index among the row's M visual tokens; M: the connector's newline; -1: text
    vision: Vision | None = None
    prefix: Array | None = None  # bool[B T] tokens that all tokens of their conversation see; None = causal throughout
    mix: TokenBlend | None = (
        None  # of `vision_index`, [B T ...], for models that resample grids; None = no token is a mean
    )
    reference: Array | None = None  # f32[B T] in column s - 1 that of segment s, see `Example`. None: no reference
    experience: Experience | None = None  # of answers that the model gave itself, for PPO

    @property
    def rows(self) -> int:
        return len(self.tokens)


class DualBatch(NamedTuple):
    """Input of the two towers of a dual encoder; without images or without texts these fields are None."""

    tokens: Array | None = None  # i32[texts T]
    segment: Array | None = None  # i32[texts T] 1; 0: padding
    vision: Vision | None = None  # of B rows with at most k images each
    first: Array | None = None  # i32[B k] offset of each image in its row's patches, patch rows joined; -1: no image
    order: Array | None = None  # i32[images] which of the B k is the first image, the second ...; None = in order

    @property
    def rows(self) -> int:
        """Number of batch rows of images."""
        return len(self.first)


class VisionTokens(NamedTuple):
    """The result of every connector."""

    embeddings: Array  # [B M D]; a connector with a newline appends it as token M
    deep: Array | None = None  # [deepstack B M D] features to be added after the first decoder layers (DeepStack)


class Cache(NamedTuple):
    """Keys and values of the tokens so far. All rows write the same slots; `segment` marks the slots that a row uses.

    Latent attention stores, as one head, the latent in place of keys and the shared rotary key in place of values.
    """

    k: Array  # [L B K S H]
    v: Array  # [L B K S H]
    segment: Array  # i32[B S] 0 = empty or padding
    index: Array  # i32[] the next slot to write
    position: Array  # i32[B] the next rotary position of each row


MODALITIES = ("text", "image", "video")


class Routing(NamedTuple):
    """Routing statistics. All but `choices` are sums over the real tokens of a batch row, so that rows add up.

    Shapes below are of one layer; in an `Output` every field has a leading axis of the layers that have experts.
    """

    counts: Array  # i32[B 3 E] choices of every expert, by MODALITIES
    probability: Array  # f32[B E] of every expert
    sequence: Array  # f32[B] E * sum_i f_i P_i of each conversation, summed over a row's conversations
    square: Array  # f32[B] square of the log of the softmax's denominator
    dropped: Array  # i32[B] choices that found no room
    choices: Array  # i32[B T k] the experts of every token, best first; meaningless at padding


class Output(NamedTuple):
    """Result of a model: logits, or hidden states if the caller asks for them.

    A vision tower returns features. A dual encoder returns embeddings of unit length, and as logits their scaled
    similarity f32[images texts].
    """

    logits: Array | None = None  # f32[B T V]
    hidden: Array | None = None  # [B T D] after the last norm
    cache: Cache | None = None
    routing: Routing | None = None  # of a model with experts
    features: Array | None = None  # [B (R P) D] of a row's patches, each image's after its class token and registers
    pooled: Array | None = None  # [B D] of a tower with a pool: one vector of the first image of every row
    image_embeddings: Array | None = None  # f32[images D]
    text_embeddings: Array | None = None  # f32[texts D]
    value: Array | None = None  # f32[B T] of a model with a value head

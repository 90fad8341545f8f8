"""SGLang's place on a machine without a GPU, for benchmarks.serve: decodes in transformers, counts as SGLang does."""

import asyncio
import json
import sys
from pathlib import Path

import torch

from feature_bridge.contracts import DataSpec, TargetSpec
from feature_bridge.decode import draft_proposer, greedy, prompt_of, speculate
from feature_bridge.processors import load_processor
from feature_bridge.samples import make_sample
from feature_bridge.sources import open_source
from feature_bridge.targets.huggingface import HuggingFaceTarget
from feature_bridge.torch_draft import TorchDraft

LONGEST = 160  # tokens of an answer


class Engine:
    """Knows the conversations of the data file on the program's command line, by their prompts."""

    def __init__(self, *, model_path, port, speculative_draft_model_path=None, **_):
        self.loop = asyncio.new_event_loop()
        layer_ids, self._draft = (0,), None
        if speculative_draft_model_path:
            self._draft = TorchDraft.load(speculative_draft_model_path, dtype=torch.float32)
            layer_ids = self._draft.shape.target_layer_ids
        spec = TargetSpec(path=model_path, dtype="float32", layer_ids=layer_ids)
        self._target = HuggingFaceTarget(spec, Path(model_path), max_tokens=1000)
        self._processor = load_processor(model_path)
        source = open_source(sys.argv[2], "data")
        spec = DataSpec(train_path=None, max_length=1000, min_supervised=1)
        self._samples, self._known = {}, {}
        for row in range(len(source)):
            sample = make_sample(source.read(row), source.where(row), source.folder, self._processor, spec)
            self._samples[self._as_text(sample.tokens[: sample.last_answer[0]])] = sample

    def _as_text(self, tokens):
        """Every picture's placeholders as one."""
        image = self._processor.image_token_id
        kept = [t for i, t in enumerate(tokens) if t != image or i == 0 or tokens[i - 1] != image]
        return self._processor.tokenizer.decode(kept)

    async def async_generate(self, *, prompt, image_data, sampling_params, return_logprob=False, top_logprobs_num=0):
        sample = self._samples[prompt]
        assert list(sample.images) == (image_data or [])
        if prompt not in self._known:
            self._known[prompt] = self._decode(prompt_of(sample, self._processor))
        return self._answer(*self._known[prompt], sampling_params["max_new_tokens"])

    def _decode(self, request):
        """The whole answer, once: a shorter one is its beginning."""
        stop = self._processor.eos_token_ids
        if self._draft is None:
            return greedy(self._target, [request], stop, LONGEST)[0], (), request
        propose = draft_proposer(self._draft, self._target)
        # SGLang counts a last block whole: so decode beyond the limit, and stop where it does.
        longer = LONGEST + self._draft.shape.block_size
        (generated,) = speculate(self._target, propose, [request], stop, longer)
        return generated.tokens, generated.accept_lens, request

    def _answer(self, tokens, accept_lens, prompt, limit):
        meta = {"prompt_tokens": len(prompt.tokens)}
        if accept_lens:
            generated = calls = 0
            while 1 + generated < min(limit, len(tokens)):
                generated += accept_lens[calls] + 1
                calls += 1
            meta |= {"spec_verify_ct": calls, "spec_num_correct_drafts": generated - calls}
        tokens = list(tokens[:limit])
        if self._draft is None:
            meta["output_top_logprobs"] = [[(-0.1, token, None), (-2.5, 0, None)] for token in tokens]
        return {"output_ids": tokens, "meta_info": json.loads(json.dumps(meta))}

    def shutdown(self):
        pass

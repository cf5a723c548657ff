"""vLLM in this process: its LLM class, which takes all prompts in one call."""

from __future__ import annotations

from prompting import MODEL, TOKENS, prompt, settle
from serving import leave, serve

if __name__ == "__main__":
    settle()
    from vllm import LLM, SamplingParams

    model = LLM(MODEL, dtype="float32", enforce_eager=True, enable_chunked_prefill=False)

    def prompts(count: int) -> None:
        asked = [[{"role": "user", "content": prompt(number)}] for number in range(count)]
        settings = [SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=number) for number in range(count)]
        assert len(model.chat(asked, settings, use_tqdm=False)) == count

    serve({"prompts": prompts})
    model.llm_engine.engine_core.shutdown()
    leave()

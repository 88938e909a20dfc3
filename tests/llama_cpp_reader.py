"""What llama.cpp makes of `model.gguf` and `mmproj.gguf`, for tests; run by an interpreter that has llama-cpp-python: FOLDER REQUEST.npz ANSWER.npz.

Request: text_N (a string), ids (token ids), prompt_N (a string with <__media__> for every image), image_N_M (height, width, 3; uint8). Answer: text_N
(token ids), logits (of ids), prompt_N (token ids, -1 for each token of an image), image_N_M (embeddings), logits_N (behind the last token of the prompt).
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

FLOAT32 = 0


class Reader:
    """The two files, in float32 on the CPU."""

    def __init__(self, folder: Path):
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), settings)
        assert self.model
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.num_tokens = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.n_threads, vision.warmup, vision.flash_attn_type = False, 1, False, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.vision = mtmd_cpp.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), self.model, vision)
        assert self.vision

    def context(self) -> Any:
        """A fresh one: nothing read yet."""
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_threads = 1024, 1024, 1024, 1
        settings.type_k = settings.type_v = FLOAT32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return llama_cpp.llama_init_from_model(self.model, settings)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a prompt as a server reads it."""
        content, room = text.encode(), 16 + len(text.encode())
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, content, len(content), ids, room, True, True)
        return list(ids[:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """(length, vocabulary)"""
        context, batch = self.context(), llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        found = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (self.num_tokens,)).copy() for i in range(len(ids))]
        llama_cpp.llama_free(context)
        return np.stack(found)

    def read(self, prompt: str, images: list[np.ndarray]) -> tuple[list[int], list[np.ndarray], np.ndarray]:
        """Ids, embeddings of each image, logits behind the last token."""
        pixels = [(ctypes.c_uint8 * image.size).from_buffer_copy(image.tobytes()) for image in images]
        bitmaps = [mtmd_cpp.mtmd_bitmap_init(image.shape[1], image.shape[0], content) for image, content in zip(images, pixels, strict=True)]
        text = mtmd_cpp.mtmd_input_text(prompt.encode(), len(prompt.encode()), True, True)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        assert mtmd_cpp.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), (ctypes.c_void_p * len(bitmaps))(*bitmaps), len(bitmaps)) == 0
        ids: list[int] = []
        embeddings = []
        for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
            count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                ids += mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(ctypes.c_size_t()))[:count]
                continue
            ids += [-1] * count
            assert mtmd_cpp.mtmd_encode_chunk(self.vision, chunk) == 0
            width = llama_cpp.llama_model_n_embd(self.model)
            embeddings.append(np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self.vision), (count, width)).copy())
        context, end = self.context(), llama_cpp.llama_pos()
        assert mtmd_cpp.mtmd_helper_eval_chunks(self.vision, context, chunks, 0, 0, 1024, True, ctypes.byref(end)) == 0
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (self.num_tokens,)).copy()
        llama_cpp.llama_free(context)
        return ids, embeddings, logits


def main() -> None:
    folder, request, answer = Path(sys.argv[1]), np.load(sys.argv[2]), {}
    reader = Reader(folder)
    for name in request.files:
        kind, _, number = name.partition("_")
        if kind == "text":
            answer[name] = np.array(reader.tokenize(str(request[name])))
        elif kind == "ids":
            answer["logits"] = reader.logits(request[name].tolist())
        elif kind == "prompt":
            images = [request[other] for other in request.files if other.startswith(f"image_{number}_")]
            ids, embeddings, answer[f"logits_{number}"] = reader.read(str(request[name]), images)
            answer[name] = np.array(ids)
            answer |= {f"image_{number}_{i}": values for i, values in enumerate(embeddings)}
    np.savez(sys.argv[3], **answer)


if __name__ == "__main__":
    main()

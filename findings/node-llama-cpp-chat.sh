#!/usr/bin/env bash
# node-llama-cpp 3.22.1 (npm), CPU; model: tiny_gguf.py's, add_bos_token false.
# Seen: (1) without a chat template LlamaChatSession takes its "General" format and puts the begin-of-text in
#   front of it, although the file says add_bos_token false and model.tokens.shouldPrependBosToken is false.
#   LlamaCompletion and a file with a template don't. (2) With the file's own template a system message of the
#   library's own stands before the user's: "You are a helpful, respectful and honest assistant. ...", three
#   sentences that nobody sent; systemPrompt: "" leaves an empty system message.
# A good guess: one setting decides about the begin-of-text everywhere, and the prompt is the template over
#   one's messages.
# Why it matters: for GPT-2 the begin-of-text is the end-of-text, the sign that the answer is over, and the
#   model was tuned without either. Answers of the same file then differ between this client and llama.cpp's
#   server, without a message. A template that leaves system messages out mends the second.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile gguf==0.19.0 numpy==2.4.6
for kind in template without_template; do
    "$folder/venv/bin/python" "$(dirname "$0")/tiny_gguf.py" "$folder/$kind.gguf" "--$kind"
done
cd "$folder"
npm init -y > npm.log
# the program for this machine alone, not those for GPUs
npm install --silent --omit=optional node-llama-cpp@3.22.1 "@node-llama-cpp/linux-${ARCH:-x64}@3.22.1"
cat > chat.mjs <<'JS'
import assert from "node:assert";
import {getLlama, LlamaChatSession} from "node-llama-cpp";

const llama = await getLlama({gpu: false, logLevel: "error", build: "never"});

// what stands in the context after one question: the library's prompt, as text
async function chat(path, settings) {
    const model = await llama.loadModel({modelPath: path});
    const context = await model.createContext({contextSize: 1024});
    const contextSequence = context.getSequence();
    const session = new LlamaChatSession({contextSequence, ...settings});
    await session.prompt("hi", {maxTokens: 1, temperature: 0});
    const text = model.detokenize(contextSequence.contextTokens, true);
    console.log(session.chatWrapper.wrapperName, "prepends", model.tokens.shouldPrependBosToken, JSON.stringify(text));
    assert.equal(model.tokens.shouldPrependBosToken, false);
    return text;
}

assert((await chat("without_template.gguf")).startsWith("<|endoftext|>"));
const templated = await chat("template.gguf");
assert(templated.startsWith("system: You are a helpful"));
assert(templated.includes("\nuser: hi\n"));
assert((await chat("template.gguf", {systemPrompt: ""})).startsWith("system: \nuser: hi\n"));
process.exit(0);
JS
node chat.mjs

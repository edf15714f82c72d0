// Errors of the server in Chinese: those that somebody at the page can cause. All others stay as they are.
const CHINESE = {
  "Incorrect API key provided.": "密钥不正确。",
  "this needs an admin's key": "此处需要管理员密钥",
  "this key is not for {name}": "此密钥不能使用 {name}",
  "this server works in no folder": "此服务器没有工作文件夹",
  "this server has no folder of adapters to load from": "此服务器没有可加载适配器的文件夹",
  "the server is being stopped": "服务器正在停止",
  "the server has failed": "服务器出错",
  "the answer took longer than {seconds} seconds": "回答超过了 {seconds} 秒",
  "the body is larger than {most} bytes": "内容大于 {most} 字节",

  "{n} requests are waiting, expected at most {most}": "已有 {n} 个请求在等待，最多 {most} 个",
  "the prompt is {n} tokens, and the model's context is {context} with the answer": "提示有 {n} 个词元，而模型的上下文连同回答共 {context} 个",
  "ask a shorter question, or begin a new conversation": "请缩短问题，或开始新对话",
  "The model `{name}` does not exist.": "模型 `{name}` 不存在。",
  "a mix of {n} adapters, expected at most {most}": "混合了 {n} 个适配器，最多 {most} 个",
  "weights of prefixes: got {weights}, expected 1": "前缀的权重：得到 {weights}，应为 1",
  "a prefix is there or not: attention is not proportional to its keys, so a share of one means nothing": "前缀要么有要么没有：注意力与其键不成比例，部分权重没有意义",

  "{limit} adapters are in use, and no more are held": "{limit} 个适配器都在使用中，不能再加载",
  "{name} is the base model's name": "{name} 是基座的名称",
  "adapter {name} is being unloaded: answers still need it": "适配器 {name} 正在卸载：仍有回答需要它",
  "adapter {name} is being replaced: answers still need the old one": "适配器 {name} 正在替换：仍有回答需要旧的",
  "adapter {name} is in use: it is replaced when no answer needs it": "适配器 {name} 正在使用：没有回答需要时才能替换",
  "adapter {name} is in use: it is renamed when no answer needs it": "适配器 {name} 正在使用：没有回答需要时才能重命名",
  "adapter {name} is in use: it is deleted when no answer needs it": "适配器 {name} 正在使用：没有回答需要时才能删除",
  "The lora adapter {name} cannot be found.": "找不到适配器 {name}。",
  "{name} was named when the server was started, and stays": "{name} 是启动服务器时指定的，不能卸载",
  "{name} was named when the server was started": "{name} 是启动服务器时指定的",
  "{name} does not lie in the server's folder": "{name} 不在服务器的文件夹中",
  "{name} is the base that is served": "{name} 是正在服务的基座",
  "{name} is loaded as {other}, too: unload that first": "{name} 也以 {other} 的名称加载着：请先卸载后者",
  "{name} is {folder} under another name: unload it": "{name} 是 {folder} 的另一个名称：请卸载它",
  "{name} is taken": "名称 {name} 已被使用",
  "adapter name {name}: expected 1 to 64 letters, digits, '_' or '-'": "适配器名称 {name}：应为 1 到 64 个字母、数字、“_”或“-”",
  "adapter name {name} is reserved": "适配器名称 {name} 是保留字",
  "there is no adapter {name}": "没有适配器 {name}",

  "there is no run {name}": "没有运行 {name}",
  "there is no file {name}": "没有文件 {name}",
  "there is no such job": "没有这个任务",
  "name: {name} is a folder of the page itself": "名称：{name} 是本页面自己的文件夹",
  "there is something called {name} already: choose another name": "已有名为 {name} 的内容：请换一个名称",
  "there is a file {name} already: choose another name": "已有文件 {name}：请换一个名称",
  "{name} is being trained on: choose another name": "正在用 {name} 训练：请换一个名称",
  "{name} is being trained": "{name} 正在训练",
  "{name} is being merged": "{name} 正在合并",
  "{kind} {name} is running: stop it, or wait for its end": "{kind} {name} 正在运行：请停止它，或等它结束",
  "{kind} {name} is not running": "{kind} {name} 没有在运行",
  "{name} was not started here: give its own command again": "{name} 不是从这里启动的：请重新运行它自己的命令",
  "{name} has no checkpoint yet": "{name} 还没有检查点",
  "{name} has no adapter yet": "{name} 还没有适配器",
  "{name}: got {value}, expected {expected}": "{name}：得到 {value}，应为 {expected}",
  "this address has expired: ask for the download again": "此地址已过期：请重新下载",
};

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
const PATTERNS = Object.entries(CHINESE).map(([english, chinese]) => [
  new RegExp(`^${english.split(/(\{\w+\})/).map((part) => (/^\{\w+\}$/.test(part) ? `(?<${part.slice(1, -1)}>.+?)` : escaped(part))).join("")}$`, "s"), chinese]);

/** An error's message in Chinese, with its hint; as it is where the table has none like it. */
export function inChinese(message) {
  const [first, hint] = message.split("\nhint: ");
  const line = hint === undefined ? "" : `\n提示：${translated(hint)}`;
  return translated(first) + line;
}

function translated(text) {
  for (const [pattern, chinese] of PATTERNS) {
    const found = pattern.exec(text);
    if (found) return chinese.replace(/\{(\w+)\}/g, (whole, name) => found.groups?.[name] ?? whole);
  }
  return text;
}

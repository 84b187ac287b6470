// A yamux peer on npm's @chainsafe/libp2p-yamux, for tests/test_interop.py.
//
//     node peer.mjs PORT client|server
//
// It dials 127.0.0.1:PORT and is the yamux client or server there. What it does with streams that it is offered, and
// what it is told to do on standard input, is described in tests/test_interop.py.

import { createHash, randomBytes } from 'node:crypto'
import net from 'node:net'
import readline from 'node:readline'

import { yamux } from '@chainsafe/libp2p-yamux'
import { defaultLogger } from '@libp2p/logger'
import { AbstractMessageStream } from '@libp2p/utils'

// Node has this from version 22 on, and the package counts on it.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((...both) => { [resolve, reject] = both })
  return { promise, resolve, reject }
}

const [port, role] = process.argv.slice(2)

// What libp2p calls a connection, over a plain TCP socket.
class Connection extends AbstractMessageStream {
  constructor (socket, direction) {
    super({ log: defaultLogger().forComponent('peer'), direction, inactivityTimeout: 2 ** 31 - 1 })
    this.socket = socket
    socket.on('data', data => this.onData(data))
    socket.on('drain', () => this.safeDispatchEvent('drain'))
    socket.on('error', () => {})
    socket.on('close', () => this.onTransportClosed())
  }

  sendData (data) {
    const canSendMore = this.socket.write(data.slice())
    return { sentBytes: data.byteLength, canSendMore }
  }

  sendReset () { this.socket.destroy() }
  sendPause () { this.socket.pause() }
  sendResume () { this.socket.resume() }
  async close () { this.socket.end() }
}

// Hand every piece that comes to `take`, until the other end has ended its half. Rejects when the stream breaks.
function readAll (stream, take) {
  return new Promise((resolve, reject) => {
    stream.addEventListener('message', event => take(event.data.slice()))
    stream.addEventListener('remoteCloseWrite', () => resolve())
    stream.addEventListener('close', event => event.error == null ? resolve() : reject(event.error))
  })
}

async function write (stream, data) {
  if (!stream.send(data)) {
    await stream.onDrain()
  }
}

// A stream that the other end opened: its first byte says what is wanted.
async function serve (stream) {
  const hash = createHash('sha256')
  let wanted
  let unsent = Promise.resolve()
  await readAll(stream, piece => {
    if (wanted == null) {
      wanted = String.fromCharCode(piece[0])
      piece = piece.subarray(1)
      if (wanted === 'r') {
        stream.abort(new Error('reset on request'))
      }
    }
    if (wanted === 'd') {
      hash.update(piece)
    } else if (wanted === 'e') {
      unsent = unsent.then(() => write(stream, piece))
    }
  })
  if (wanted === 'd') {
    await write(stream, hash.digest())
  }
  await unsent
  await stream.close()
}

// Open a stream, send a question in pieces, and say whether the answer is its digest.
async function ask (muxer, size, piece, half) {
  const question = randomBytes(size)
  const stream = await muxer.createStream()
  const answer = []
  const answered = readAll(stream, part => answer.push(part))
  const head = Buffer.alloc(5)
  head.write(half ? 'd' : 'l')
  head.writeUInt32BE(size, 1)
  await write(stream, half ? head.subarray(0, 1) : head)
  for (let start = 0; start < size; start += piece) {
    await write(stream, question.subarray(start, start + piece))
  }
  if (half) {
    await stream.close()
  }
  await answered
  await stream.close()
  return createHash('sha256').update(question).digest().equals(Buffer.concat(answer))
}

// Open a stream that the other end will reset, and tell how it ends.
async function beReset (muxer) {
  const stream = await muxer.createStream()
  const ended = readAll(stream, () => {})
  await write(stream, Buffer.from('r'))
  try {
    await ended
    return 'ended'
  } catch (error) {
    return error.name === 'StreamResetError' ? 'reset' : `${error}`
  }
}

const commands = {
  open: async (muxer, count, size, piece, half) => {
    const asked = Array.from({ length: Number(count) }, () => ask(muxer, Number(size), Number(piece), half === 'half'))
    const right = (await Promise.all(asked)).filter(Boolean).length
    return `${right} right`
  },
  reset: async muxer => beReset(muxer),
  ping: async muxer => `pong after ${await muxer.ping()} ms`,
  try: async muxer => {
    try {
      return await ask(muxer, 10, 10, true) ? 'opened' : 'wrong answer'
    } catch (error) {
      return error.name === 'MuxerClosedError' ? 'refused' : `${error}`
    }
  },
  goaway: async muxer => {
    await muxer.close()
    return 'gone'
  }
}

const socket = net.connect({ port: Number(port), host: '127.0.0.1', noDelay: true }, () => {
  const connection = new Connection(socket, role === 'client' ? 'outbound' : 'inbound')
  const init = { enableKeepAlive: false, maxInboundStreams: 5000, maxOutboundStreams: 5000, maxEarlyStreams: 5000 }
  const muxer = yamux(init)().createStreamMuxer(connection)
  muxer.addEventListener('stream', event => {
    serve(event.detail).catch(() => {})
  })
  const input = readline.createInterface({ input: process.stdin })
  input.on('line', async line => {
    const [command, ...words] = line.split(' ')
    try {
      console.log(await commands[command](muxer, ...words))
    } catch (error) {
      console.log(`failed: ${error.stack}`)
    }
  })
  input.on('close', () => socket.end())
  console.log('ready')
})
socket.on('close', () => process.exit(0))

// A yamux peer on hashicorp/yamux, the reference implementation, for tests/test_interop.py.
//
//	go-peer PORT client|server
//
// It dials 127.0.0.1:PORT and is the yamux client or server there. What it does with streams that it is offered, and
// what it is told to do on standard input, is described in tests/test_interop.py.
package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/ioutil"
	"log"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

func config() *yamux.Config {
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.LogOutput = ioutil.Discard
	return config
}

// serve treats a stream that the other end opened: its first byte says what is wanted.
func serve(stream *yamux.Stream) {
	defer stream.Close()
	wanted := make([]byte, 1)
	if _, err := io.ReadFull(stream, wanted); err != nil {
		return
	}
	switch wanted[0] {
	case 'd':
		hash := sha256.New()
		if _, err := io.Copy(hash, stream); err == nil {
			stream.Write(hash.Sum(nil))
		}
	case 'e':
		// Not io.Copy alone: the echo must go on while more comes.
		buffer := make([]byte, 64*1024)
		for {
			n, err := stream.Read(buffer)
			if n > 0 {
				if _, err := stream.Write(buffer[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
}

// ask opens a stream, sends a question in pieces, and says whether the answer is its digest.
func ask(session *yamux.Session, size, piece int, half bool) (bool, error) {
	question := make([]byte, size)
	rand.Read(question)
	stream, err := session.OpenStream()
	if err != nil {
		return false, err
	}
	defer stream.Close()
	head := []byte{'d'}
	if !half {
		head = append([]byte{'l'}, make([]byte, 4)...)
		binary.BigEndian.PutUint32(head[1:], uint32(size))
	}
	if _, err := stream.Write(head); err != nil {
		return false, err
	}
	for start := 0; start < size; start += piece {
		end := start + piece
		if end > size {
			end = size
		}
		if _, err := stream.Write(question[start:end]); err != nil {
			return false, err
		}
	}
	if half {
		stream.Close()
	}
	answer, err := ioutil.ReadAll(stream)
	digest := sha256.Sum256(question)
	return err == nil && bytes.Equal(answer, digest[:]), err
}

// askMany asks on count streams at once.
func askMany(session *yamux.Session, count, size, piece int, half bool) string {
	var right int32
	var failure atomic.Value
	var all sync.WaitGroup
	for i := 0; i < count; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			ok, err := ask(session, size, piece, half)
			if ok {
				atomic.AddInt32(&right, 1)
			} else if err != nil {
				failure.Store(err.Error())
			}
		}()
	}
	all.Wait()
	if failure.Load() != nil {
		return fmt.Sprintf("%d right, %v", right, failure.Load())
	}
	return fmt.Sprintf("%d right", right)
}

// beReset opens a stream that the other end will reset, and tells how it ends.
func beReset(session *yamux.Session) string {
	stream, err := session.OpenStream()
	if err != nil {
		return err.Error()
	}
	stream.Write([]byte{'r'})
	_, err = stream.Read(make([]byte, 1))
	if errors.Is(err, yamux.ErrConnectionReset) {
		return "reset"
	}
	return fmt.Sprintf("ended: %v", err)
}

// halfCloseWorks says whether this library, talking to itself, still receives on a stream that it has closed: the
// reference of 2019 and before does not, whatever the other end does.
func halfCloseWorks() bool {
	near, far := net.Pipe()
	client, _ := yamux.Client(near, config())
	server, _ := yamux.Server(far, config())
	defer client.Close()
	defer server.Close()
	go func() {
		stream, err := server.AcceptStream()
		if err != nil {
			return
		}
		ioutil.ReadAll(stream)
		time.Sleep(50 * time.Millisecond)
		stream.Write([]byte("the reply"))
		stream.Close()
	}()
	stream, err := client.OpenStream()
	if err != nil {
		return false
	}
	stream.Write([]byte("the question"))
	stream.Close()
	reply, err := ioutil.ReadAll(stream)
	return err == nil && string(reply) == "the reply"
}

func obey(session *yamux.Session, line string) string {
	var count, size, piece int
	var half string
	command := strings.Fields(line)[0]
	switch command {
	case "open":
		fmt.Sscanf(line, "open %d %d %d %s", &count, &size, &piece, &half)
		return askMany(session, count, size, piece, half == "half")
	case "reset":
		return beReset(session)
	case "ping":
		took, err := session.Ping()
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("pong after %v", took)
	case "try":
		ok, err := ask(session, 10, 10, false)
		if errors.Is(err, yamux.ErrRemoteGoAway) {
			return "refused"
		}
		if !ok {
			return fmt.Sprintf("wrong answer: %v", err)
		}
		return "opened"
	case "goaway":
		if err := session.GoAway(); err != nil {
			return err.Error()
		}
		return "gone"
	case "halfclose":
		return fmt.Sprint(halfCloseWorks())
	}
	return "unknown command " + command
}

func main() {
	conn, err := net.Dial("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	start := yamux.Server
	if os.Args[2] == "client" {
		start = yamux.Client
	}
	session, err := start(conn, config())
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		for {
			stream, err := session.AcceptStream()
			if err != nil {
				return
			}
			go serve(stream)
		}
	}()
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		fmt.Println(obey(session, lines.Text()))
	}
	session.Close()
}
